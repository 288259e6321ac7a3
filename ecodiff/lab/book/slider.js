(() => {
  const c = CONSTANTS;
  const box = document.currentScript.closest(".ratio-slider");
  const slider = box.querySelector("input");

  function show() {
    const stop = c.stops[+slider.value];
    slider.setAttribute("aria-valuetext", stop.share);
    box.querySelector("output").textContent = stop.share;
    box.querySelector(".ratio-says").textContent = stop.says;
    box.querySelectorAll("tbody tr").forEach((line, i) => {
      const row = stop.rows[i];
      const [ssim, right] = line.querySelectorAll("th span");
      ssim.textContent = row.ssim;
      right.textContent = row.right;
      line.querySelectorAll("td").forEach((cell, j) => {
        const tile = cell.querySelector(".ratio-tile");
        tile.style.backgroundPositionX = `${100 * row.column / (c.columns - 1)}%`;
        tile.setAttribute("aria-label", row.tiles[j].text);
        cell.querySelector("span").textContent = row.tiles[j].below;
      });
    });
  }
  slider.addEventListener("input", show);
  show();
})();
