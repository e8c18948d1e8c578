"use strict";
// What a plot says under the pointer, or where the arrow keys have gone. Its data lie in it as JSON:
// kind "x": series with x, y (0 at the left and bottom, 1 opposite), at (what x is called) and text; kind "cell": a grid.
(() => {
  const tip = document.getElementById("tip");
  const number = (value) => {
    if (value === null) return "–";
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(value);
  };
  const make = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const nearest = (places, x) => {
    let best = -1;
    places.forEach((place, i) => {
      if (place !== null && (best < 0 || Math.abs(place - x) < Math.abs(places[best] - x))) best = i;
    });
    return best;
  };

  const start = (plot) => {
    const data = JSON.parse(plot.querySelector("script").textContent);
    const marks = [];
    let focus = { x: 0, y: 1 };
    const hide = () => {
      tip.hidden = true;
      marks.splice(0).forEach((mark) => mark.remove());
    };
    const mark = (className, style) => {
      const element = make("div", className);
      Object.assign(element.style, style);
      plot.append(element);
      marks.push(element);
    };
    const row = (name, value) => {
      const line = make("div");
      line.append(make("span", "", name), make("span", "", value));
      tip.append(line);
    };
    const showX = (x) => {
      const found = data.series.map((series) => nearest(series.x, x));
      const places = data.series.map((series, s) => (found[s] < 0 ? null : series.x[found[s]]));
      const leader = nearest(places, x);
      if (leader < 0) return;
      tip.append(make("b", "", data.series[leader].at[found[leader]]));
      mark("at", { left: `${100 * places[leader]}%` });
      data.series.forEach((series, s) => {
        const i = found[s];
        if (i < 0) return;
        const elsewhere = series.at[i] === data.series[leader].at[found[leader]] ? "" : ` (${series.at[i]})`;
        row(series.name + elsewhere, series.text[i]);
        if (series.y[i] !== null) mark(`dot ${series.colour}`, { left: `${100 * series.x[i]}%`, bottom: `${100 * series.y[i]}%` });
      });
      focus.x = places[leader];
    };
    const showCell = (x, y) => {
      const [rows, columns] = [data.rows.length, data.columns.length];
      const r = Math.min(rows - 1, Math.max(0, Math.floor((1 - y) * rows)));
      const c = Math.min(columns - 1, Math.max(0, Math.floor(x * columns)));
      tip.append(make("b", "", number(data.cells[r][c])));
      row(data.rows[r], data.columns[c]);
      mark("cell", { left: `${(100 * c) / columns}%`, top: `${(100 * r) / rows}%`, width: `${100 / columns}%`, height: `${100 / rows}%` });
      focus = { x: (c + 0.5) / columns, y: 1 - (r + 0.5) / rows };
    };
    const show = (x, y) => {
      hide();
      tip.replaceChildren();
      if (data.kind === "x") showX(x);
      else showCell(x, y);
      const box = plot.getBoundingClientRect();
      tip.hidden = false;
      const [width, height] = [tip.offsetWidth, tip.offsetHeight];
      const left = box.left + focus.x * box.width + 14;
      const fits = left + width < innerWidth - 8;
      const top = data.kind === "x" ? box.top + 8 : box.top + (1 - focus.y) * box.height - height - 10;
      tip.style.left = `${Math.max(8, fits ? left : left - width - 28)}px`;
      tip.style.top = `${scrollY + Math.max(8, top)}px`;
    };
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      show((event.clientX - box.left) / box.width, 1 - (event.clientY - box.top) / box.height);
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide();
      const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] ?? [0, 0];
      if (!dx && !dy) return;
      event.preventDefault();
      if (data.kind === "cell") {
        const step = marks.length ? 1 : 0; // the first press shows where one is
        return show(focus.x + (step * dx) / data.columns.length, focus.y + (step * dy) / data.rows.length);
      }
      const places = data.series.flatMap((series) => series.x).filter((x) => x !== null).sort((a, b) => a - b);
      const next = dx > 0 ? places.find((x) => x > focus.x + 1e-6) : places.findLast((x) => x < focus.x - 1e-6);
      show(marks.length ? (next ?? focus.x) : places[0], 0);
    });
  };
  document.querySelectorAll(".plot").forEach(start);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
})();
