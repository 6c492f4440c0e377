"use strict";
// The search box hides what does not hold every word; a line follows the sound that plays.
(() => {
  const entries = [...document.querySelectorAll(".feature")];
  const box = document.getElementById("search");
  if (box) {
    const count = document.getElementById("count");
    const filter = () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      entries.forEach((entry) => { entry.hidden = !words.every((word) => entry.dataset.words.includes(word)); });
      count.textContent = `${entries.filter((entry) => !entry.hidden).length} of ${entries.length}`;
    };
    box.closest("p").hidden = false;
    box.addEventListener("input", filter);
    filter();
  }
  const open = () => {
    const wanted = location.hash && document.getElementById(location.hash.slice(1));
    if (wanted && wanted.matches(".feature")) wanted.open = true;
  };
  addEventListener("hashchange", open);
  open();
  document.querySelectorAll(".moment").forEach((moment) => {
    const audio = moment.querySelector("audio") || document.getElementById("heard");
    const picture = moment.querySelector(".picture"), line = picture.querySelector("i");
    const follow = () => {
      line.hidden = false;
      line.style.left = `${100 * audio.currentTime / (audio.duration || 1)}%`;
      if (!audio.paused) requestAnimationFrame(follow);
    };
    audio.addEventListener("play", () => {
      document.querySelectorAll("audio").forEach((other) => { if (other !== audio) other.pause(); });
      follow();
    });
    audio.addEventListener("seeked", follow);
    picture.addEventListener("click", (event) => {
      const box = picture.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
      const jump = () => { audio.currentTime = share * audio.duration; };
      if (audio.readyState) jump();
      else audio.addEventListener("loadedmetadata", jump, { once: true });
      audio.play().catch(() => {});
    });
  });
})();
