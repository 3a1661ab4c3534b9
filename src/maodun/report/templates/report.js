"use strict";
(function () {
  const plain = document.getElementById("figures");
  if (!plain || typeof Plotly === "undefined") { return; }
  const figures = JSON.parse(plain.textContent);
  const config = {
    responsive: true, displaylogo: false, scrollZoom: false, doubleClick: "reset",
    displayModeBar: window.matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  function draw(box) {
    const figure = figures[box.id];
    if (!figure || box.dataset.drawn) { return; }
    box.dataset.drawn = "1";
    const still = box.firstElementChild;
    const live = document.createElement("div");
    live.className = "plot";
    box.appendChild(live);
    still.style.display = "none";
    // Should Plotly fail, the static picture comes back.
    Plotly.newPlot(live, figure.data, figure.layout, config).catch(function () {
      live.remove();
      still.style.display = "";
    });
  }
  const boxes = document.querySelectorAll(".figure");
  if (!("IntersectionObserver" in window)) { boxes.forEach(draw); return; }
  const watch = new IntersectionObserver(function (entries) {
    entries.forEach(function (entry) {
      if (entry.isIntersecting) { watch.unobserve(entry.target); draw(entry.target); }
    });
  }, { rootMargin: "400px" });
  boxes.forEach(function (box) { watch.observe(box); });
})();
