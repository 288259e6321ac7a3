(() => {
  const c = CONSTANTS;
  const box = document.currentScript.closest(".hc-explorer");
  const find = (selector) => box.querySelector(selector);
  const slider = (name) => find(`input[name=${name}]`);
  const clip = (x) => Math.min(1, Math.max(0, x));
  const sigmoid = (x) => 1 / (1 + Math.exp(-x));
  const x = (l) => c.left + (l + c.range) / (2 * c.range) * (c.width - c.left - 10);
  const y = (z) => c.height - c.bottom - z * (c.height - c.bottom - c.top);
  const grid = Array.from({ length: 121 }, (_, i) => -c.range + 2 * c.range * i / 120);
  const points = (f) => grid.map((l) => `${x(l).toFixed(1)},${y(f(l)).toFixed(1)}`);

  function draw() {
    const l = +slider("lambda").value, d = +slider("delta").value, a = +slider("alpha").value;
    const noise = (u) => Math.log((u + d) / (1 - u + d));
    const gate = (location) => clip(sigmoid(location / a) * (c.zeta - c.gamma) + c.gamma);
    const edge = a * Math.log(-c.gamma / c.zeta);
    const open = (at) => clip((1 + 2 * d) * sigmoid(at - edge) - d);
    const low = points((at) => gate(at + noise(c.levels[0])));
    const high = points((at) => gate(at + noise(c.levels[c.levels.length - 1])));
    find(".hc-band").setAttribute("d", `M${low.join("L")}L${high.reverse().join("L")}Z`);
    find(".hc-median").setAttribute("d", "M" + points(gate).join("L"));
    find(".hc-open").setAttribute("d", "M" + points(open).join("L"));
    const here = find(".hc-here");
    here.setAttribute("x1", x(l));
    here.setAttribute("x2", x(l));
    find(".hc-draws").innerHTML = c.levels.map((u) =>
      `<circle cx="${x(l).toFixed(1)}" cy="${y(gate(l + noise(u))).toFixed(1)}" r="3.2"/>`).join("");
    const zero = 1 - open(l), one = 1 - open(-l);
    const stuck = d > 0 ? `From λ = ${(Math.log((1 + d) / d) - edge).toFixed(2)} on it is zero in every draw.`
      : "Without a limit on the noise, no λ makes it zero in every draw.";
    const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
    find(".hc-says").textContent = `The gate is exactly 0 in ${percent(zero)} of the draws and exactly 1 in ` +
      `${percent(one)}. The gradient is zero in these ${percent(zero + one)}. ${stuck}`;
    for (const input of box.querySelectorAll("input")) {
      input.parentElement.querySelector("output").textContent = input.value;
    }
  }
  box.addEventListener("input", draw);
  find("button").addEventListener("click", () => {
    for (const input of box.querySelectorAll("input")) input.value = input.defaultValue;
    draw();
  });
  draw();
})();
