// A class's score map with its scale; `props.value` is what catseg_fast/page_data.py makes in heat_data.

const render = () => {
  const root = element.querySelector(".cf-heat");
  const data = props.value;
  root.replaceChildren();
  if (!data || !data.picture) return;
  const image = new Image();
  image.src = data.picture;
  image.alt = `Score map of ${data.name}`;
  const scale = document.createElement("div");
  scale.className = "cf-scale";
  const bar = document.createElement("div");
  bar.style.background = data.gradient;
  const [low, middle, high] = ["0", `mean ${data.mean.toFixed(3)}`, data.top.toFixed(3)].map((text) => {
    const span = document.createElement("span");
    span.textContent = text;
    return span;
  });
  const ends = document.createElement("div");
  ends.append(low, middle, high);
  scale.append(bar, ends);
  root.append(image, scale);
};

watch("value", render);
render();
