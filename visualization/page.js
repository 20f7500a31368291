(() => {
  "use strict";
  const film = document.querySelector("video");
  const trouble = document.querySelector(".trouble");
  if (!film) return;
  const sources = film.querySelectorAll("source");
  // The event of the last source is the browser's last word.
  sources[sources.length - 1].addEventListener("error", () => { trouble.hidden = false; });
  film.addEventListener("error", () => { trouble.hidden = false; });
  film.addEventListener("playing", () => { trouble.hidden = true; });
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-at]");
    if (!button) return;
    film.currentTime = Number(button.dataset.at);
    film.scrollIntoView({ behavior: calm.matches ? "auto" : "smooth", block: "center" });
    film.play().catch(() => { trouble.hidden = film.error === null && film.networkState !== 3; });
  });
})();
