(() => {
  const c = CONSTANTS;
  const box = document.currentScript.closest(".cost-calculator");
  const field = (name) => box.querySelector(`[name=${name}]`);
  const number = (name) => Math.min(+field(name).max, Math.max(+field(name).min, +field(name).value || 0));
  const whole = (value) => Math.round(value).toLocaleString("en-US");
  const gb = (bytes) => (bytes / 1e9).toLocaleString("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 }) + " GB";

  function column(row, share) {
    const steps = Math.round(number("steps")), batch = Math.round(number("batch"));
    const doubled = field("guided").checked && row.guided !== "embedded";
    const samples = batch * (doubled && row.guided === "batch" ? 2 : 1);
    const calls = steps * (doubled && row.guided === "calls" ? 2 : 1);
    const p = {};
    for (const key in row.points[0]) {
      p[key] = row.points[0][key] + (row.points[1][key] - row.points[0][key]) * share / c.far;
    }
    const forwards = steps * (doubled ? 2 : 1);
    const base = p.weights + row.others + calls * row.inputs * samples;
    const denoising = (row.inputs + p.forward) * samples, decoding = row.decode * batch;
    return {
      steps, keep: { base, held: p.held * samples * calls / steps, peak: p.peak * samples + (calls / steps - 1) * p.held * samples },
      values: [p.parameters, p.paper * forwards, p.total * forwards, base + ((calls - 1) * p.held + p.peak) * samples,
        base + p.peak * samples, base + p.inner_peak * samples, p.weights + row.others + Math.max(denoising, decoding),
        Math.max(row.encoder, p.weights + denoising, row.vae + decoding)],
    };
  }

  function show() {
    const row = c.rows.find((one) => one.name === field("model").value);
    const columns = [column(row, 0), column(row, number("ratio") / 100)];
    box.querySelectorAll("tbody tr").forEach((line, i) => {
      line.querySelectorAll("td").forEach((cell, j) => {
        const value = columns[j].values[i];
        cell.textContent = i === 0 ? whole(value / 1e6) + " M" : i < 3 ? whole(value / 1e9) + " GFLOP" : gb(value);
      });
    });
    const room = number("gpu") * 1e9 * (1 - c.fragments) - c.context;
    const { keep, steps, values } = columns[0];
    const kept = Math.min(steps, Math.floor((room - keep.base - keep.peak) / keep.held) + 1);
    const learning = kept >= steps ? "fits without checkpointing"
      : kept >= 1 ? `fits with time-step checkpointing (keep_last=${kept})`
      : values[5] <= room ? "fits only with checkpointing inside the denoiser, too" : "does not fit";
    const generating = columns.map((one) => one.values[6] <= room ? "fits" : one.values[7] <= room ? "fits with CPU offload" : "does not fit");
    box.querySelector(".cost-says").textContent =
      `Generating ${generating[0]} before pruning and ${generating[1]} after it. ` +
      `Learning a mask ${learning}. Of ${number("gpu")} GB, ${gb(room)} count as usable.`;
  }
  box.addEventListener("input", (event) => {
    if (event.target.name === "model") field("steps").value = c.rows.find((one) => one.name === event.target.value).steps;
    show();
  });
  show();
})();
