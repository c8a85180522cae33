// The viewer: photo, coloured classes over it, legend, and the class under the pointer.
// Gradio runs this with `element`, `props`, `trigger` and `watch`; `props.value` is what
// catseg_fast/page_data.py makes in viewer_data.

const make = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};

const percent = (share) => (share >= 0.001 ? `${(100 * share).toFixed(1)}%` : "<0.1%");

let opacity = 60;
let shown = null; // what is drawn now

const loadPicture = (source) =>
  new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = source;
  });

const readLabels = (image, width, height) => {
  const canvas = make("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, width, height).data;
  const ranks = new Uint16Array(width * height);
  const scores = new Uint8Array(width * height);
  for (let i = 0; i < ranks.length; i++) {
    ranks[i] = pixels[4 * i] | (pixels[4 * i + 1] << 8);
    scores[i] = pixels[4 * i + 2];
  }
  return { ranks, scores };
};

const paint = (canvas, view, only) => {
  const { data, ranks } = view;
  const { width, height, classes } = data;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(width, height);
  const pixels = new Uint32Array(picture.data.buffer); // little-endian: ABGR
  const colours = classes.map(({ colour }, rank) => {
    if (!colour) return 0; // no class fits: the photo as it is
    const [red, green, blue] = colour;
    const alpha = only === null || only === rank ? 255 : 30;
    return ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  });
  for (let i = 0; i < ranks.length; i++) pixels[i] = colours[ranks[i]];
  const line = Math.max(1, Math.round(Math.sqrt(width * height) / 700));
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const i = y * width + x;
      const edge =
        (x >= line && ranks[i] !== ranks[i - line]) ||
        (y >= line && ranks[i] !== ranks[i - line * width]);
      if (edge) pixels[i] = only === null ? 0xffffffff : 0x90ffffff;
    }
  }
  context.putImageData(picture, 0, 0);
};

const legend = (data, highlight) => {
  const box = make("div", "cf-legend");
  const found = data.classes.filter((entry) => entry.colour).length;
  const head = make("div", "cf-legend-head");
  head.append(
    make("b", "", `${found} of ${data.total} ${data.total === 1 ? "class" : "classes"}`),
    make("span", "", found === 1 ? "occurs" : "occur"),
  );
  const list = make("div", "cf-legend-list");
  list.setAttribute("role", "list");
  data.classes.forEach((entry, rank) => {
    const item = make("button", "cf-item");
    item.type = "button";
    item.dataset.rank = rank;
    const swatch = make("span", "cf-swatch");
    if (entry.colour) {
      item.title = `${entry.name}: show its score map`;
      swatch.style.background = `rgb(${entry.colour.join(" ")})`;
    } else {
      item.title = "Pixels whose best class has a lower score than asked for";
    }
    item.append(swatch, make("span", "cf-name", entry.name), make("span", "cf-share", percent(entry.share)));
    item.onpointerenter = () => highlight(rank);
    item.onpointerleave = () => highlight(null);
    item.onfocus = () => highlight(rank);
    item.onblur = () => highlight(null);
    if (entry.colour) item.onclick = () => trigger("select", { index: entry.index });
    list.append(item);
  });
  box.append(head, list);
  return box;
};

const slider = (canvas) => {
  const label = make("label", "cf-slider");
  const input = make("input");
  input.type = "range";
  input.min = 0;
  input.max = 100;
  input.value = opacity;
  input.setAttribute("aria-label", "Opacity of the colours");
  input.oninput = () => {
    opacity = Number(input.value);
    canvas.style.opacity = opacity / 100;
  };
  canvas.style.opacity = opacity / 100;
  label.append(make("span", "", "Photo"), input, make("span", "", "Classes"));
  return label;
};

const hover = (stage, canvas, view, root) => {
  const { data, ranks, scores } = view;
  const tip = make("div", "cf-tip");
  const swatch = make("span", "cf-swatch");
  const name = make("b");
  const score = make("span", "cf-share");
  tip.append(swatch, name, score);
  tip.hidden = true;
  const leave = () => {
    tip.hidden = true;
    root.querySelectorAll(".cf-item.cf-on").forEach((item) => item.classList.remove("cf-on"));
  };
  const show = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * data.width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * data.height);
    if (x < 0 || y < 0 || x >= data.width || y >= data.height) return leave();
    const rank = ranks[y * data.width + x];
    const entry = data.classes[rank];
    swatch.style.background = entry.colour ? `rgb(${entry.colour.join(" ")})` : "none";
    name.textContent = entry.name;
    score.textContent = (scores[y * data.width + x] / 255).toFixed(2);
    tip.hidden = false;
    const left = event.clientX - box.left;
    const width = tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(left + 14, box.width - width))}px`;
    tip.style.top = `${Math.max(0, event.clientY - box.top - tip.offsetHeight - 12)}px`;
    leaveItems(rank);
  };
  const leaveItems = (rank) => {
    root.querySelectorAll(".cf-item").forEach((item) => {
      item.classList.toggle("cf-on", Number(item.dataset.rank) === rank);
    });
  };
  stage.addEventListener("pointermove", show);
  stage.addEventListener("pointerdown", show);
  stage.addEventListener("pointerleave", leave);
  stage.append(tip);
};

const empty = (root) => {
  const box = make("div", "cf-empty");
  box.append(
    make("b", "", "Nothing segmented yet"),
    make("span", "", "Drop a picture, name the classes, and press “Segment”."),
  );
  root.replaceChildren(box);
};

const render = async () => {
  const root = element.querySelector(".cf-viewer");
  const data = props.value;
  shown = data;
  if (!data || !data.classes) return empty(root);
  const [photo, packed] = await Promise.all([loadPicture(data.photo), loadPicture(data.labels)]);
  if (shown !== data) return; // a later answer came meanwhile
  const view = { data, ...readLabels(packed, data.width, data.height) };
  const stage = make("div", "cf-stage");
  stage.style.aspectRatio = `${data.width} / ${data.height}`;
  stage.style.maxWidth = `calc(68vh * ${data.width / data.height})`;
  const canvas = make("canvas", "cf-classes");
  canvas.width = data.width;
  canvas.height = data.height;
  photo.alt = "The picture";
  stage.append(photo, canvas);
  paint(canvas, view, null);
  const left = make("div", "cf-left");
  left.append(stage, slider(canvas));
  root.replaceChildren(left, legend(data, (rank) => paint(canvas, view, rank)));
  hover(stage, canvas, view, root);
};

watch("value", render);
render();
