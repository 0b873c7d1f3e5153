"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const near = (list, at) => list.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));

// Loss curves: a line follows the pointer or the arrow keys, and the values are said below.
for (const svg of document.querySelectorAll("svg.chart")) {
  const [left, right, last] = ["left", "right", "last"].map((key) => Number(svg.dataset[key]));
  const cross = svg.querySelector(".cross");
  let at = last;
  const show = (step) => {
    at = Math.min(last, Math.max(0, Math.round(step)));
    const x = left + ((right - left) * at) / last;
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    cross.setAttribute("visibility", "visible");
    const words = ["step " + at];
    for (const { name, training, held } of data.curves) {
      if (training.length && at > 0) {
        const [, loss, mean] = near(training, at);
        words.push(`${name}: training ${loss.toFixed(3)} (mean ${mean.toFixed(3)})`);
      }
      const point = held.find((pair) => pair[0] === at);
      if (point) words.push(`${name}: held out ${point[1].toFixed(3)}`);
    }
    document.getElementById("loss-at").textContent = words.join("  ·  ");
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show(((x - left) / (right - left)) * last);
  });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -last, End: last }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(at + move);
  });
}

// The timeline: bars are [row, name, start, length] in microseconds.
const canvas = document.getElementById("timeline");
if (canvas) {
  const { rows, names, bars, end, steps } = data.timeline;
  const ROW = 42, BAR = 20, AXIS = 24, colours = {};
  const pen = canvas.getContext("2d"), said = document.getElementById("span-at");
  const kinds = { owner: "model", cipher: "cipher", up: "wire", worker: "worker", down: "down", away: "wire" };
  let from = 0, to = end, drag = null, chosen = -1;
  const width = () => canvas.clientWidth;
  const px = (us) => ((us - from) / (to - from)) * width();
  const time = (us) => (us === 0 ? "0" : us < 1e4 ? us.toFixed(0) + " µs" : us < 1e6 ? (us / 1e3).toFixed(1) + " ms" : (us / 1e6).toFixed(2) + " s");
  const tops = [];
  let height = 6;
  for (const row of rows) {
    if (row.label) height += 18;
    tops.push(height);
    height += BAR + (ROW - BAR - 18);
  }
  height += AXIS;
  canvas.style.height = height + "px";

  function draw() {
    const scale = window.devicePixelRatio || 1, style = getComputedStyle(document.documentElement);
    for (const name of ["model", "cipher", "wire", "worker", "down", "ink", "soft", "rule"])
      colours[name] = style.getPropertyValue("--" + name).trim();
    canvas.width = Math.round(width() * scale);
    canvas.height = Math.round(height * scale);
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width(), height);
    pen.font = "12px system-ui, sans-serif";
    axis();
    rows.forEach((row, i) => {
      pen.fillStyle = colours.soft;
      if (row.label) pen.fillText(row.label, 8, tops[i] - 6);
      pen.fillStyle = colours.rule;
      pen.fillRect(0, tops[i] + BAR, width(), 1);
    });
    bars.forEach(([row, , start, length], i) => {
      const x = px(start), w = px(start + length) - x;
      if (x > width() || x + w < 0) return;
      pen.fillStyle = i === chosen ? colours.ink : colours[kinds[rows[row].kind]];
      pen.fillRect(x, tops[row], Math.max(w - (w > 3 ? 0.7 : 0), 0.6), BAR);
    });
  }
  function axis() {
    const about = (to - from) / Math.max(2, width() / 130), power = 10 ** Math.floor(Math.log10(about));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= about);
    for (let us = Math.ceil(from / step) * step; us < to; us += step) {
      pen.fillStyle = colours.rule;
      pen.fillRect(px(us), 0, 1, height - AXIS + 4);
      pen.fillStyle = colours.soft;
      if (px(us) < width() - 50) pen.fillText(time(us), px(us) + 3, height - 7);
    }
    pen.fillStyle = colours.soft;
    for (const us of steps.slice(1)) pen.fillRect(px(us) - 0.75, 0, 1.5, height - AXIS + 4);
  }
  function view(a, b) {
    const size = Math.min(end, Math.max(50, b - a));
    from = Math.min(Math.max(0, a), end - size);
    to = from + size;
    draw();
  }
  const zoom = (factor, middle = (from + to) / 2) => view(middle - (middle - from) * factor, middle + (to - middle) * factor);
  const move = (share) => view(from + share * (to - from), to + share * (to - from));
  const closer = () => {
    const sent = bars.filter((bar) => ["up", "away"].includes(rows[bar[0]].kind));
    const at = Math.floor(sent.length / 8);
    if (sent.length > at + 6) view(sent[at][2] - 0.01 * (sent[at + 5][2] - sent[at][2]), sent[at + 5][2]);
  };
  const actions = { in: () => zoom(0.5), out: () => zoom(2), left: () => move(-0.3), right: () => move(0.3), all: () => view(0, end), closer };
  const keys = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", 0: "all" };
  for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", actions[button.dataset.do]);
  canvas.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[keys[event.key]]();
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(event.deltaY / 250), from + (event.offsetX / width()) * (to - from));
  }, { passive: false });
  canvas.addEventListener("dblclick", (event) => zoom(0.4, from + (event.offsetX / width()) * (to - from)));
  canvas.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, from, to };
    canvas.setPointerCapture(event.pointerId);
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { drag = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (drag && event.buttons) {
      const shift = ((drag.x - event.clientX) / width()) * (drag.to - drag.from);
      view(drag.from + shift, drag.to + shift);
      return;
    }
    const us = from + (event.offsetX / width()) * (to - from), slack = (2 / width()) * (to - from);
    const found = bars.findIndex(([row, , start, length]) =>
      us >= start - slack && us <= start + length + slack && event.offsetY >= tops[row] && event.offsetY <= tops[row] + BAR);
    if (found === chosen) return;
    chosen = found;
    draw();
    if (found < 0) return;
    const [row, name, start, length] = bars[found];
    const label = rows[row].label || rows[row].kind;
    said.textContent = `${label}: ${names[name]}  ·  ${time(length)}, from ${time(start)} on`;
  });
  new ResizeObserver(draw).observe(canvas);
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
}
