"use strict";
// One audio element a player: turning the knob swaps its source at the same position.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const players = read("players");
  const media = read("media");
  const blobs = {};

  const url = (key) => {
    if (!blobs[key]) {
      const [head, body] = media[key].split(",");
      const bytes = Uint8Array.from(atob(body), (c) => c.charCodeAt(0));
      blobs[key] = URL.createObjectURL(new Blob([bytes], { type: head.slice(5, head.indexOf(";")) }));
    }
    return blobs[key];
  };

  const number = (value, digits) => value.toFixed(digits).replace("-", "−");
  const READOUT = [
    ["centroid_hz", "centroid", (v) => `${number(v, 0)} Hz`],
    ["loudness_change_db", "loudness", (v) => `${number(v, 1)} dB`],
    ["mel_distance", "mel distance", (v) => `${number(v, 1)} dB`],
    ["f0_error_cents", "f0 error", (v) => `${number(v, 0)} cents`],
    ["speaker_similarity", "same speaker", (v) => number(v, 2)],
  ];

  function start(root) {
    const data = players[root.dataset.target][Number(root.dataset.index)];
    const find = (selector) => root.querySelector(selector);
    const audio = find("audio"), slider = find(".alpha-slider"), play = find(".play");
    const property = find(".property"), arm = find(".arm"), line = find(".picture i");
    let source = "steered";

    const group = () => data.groups[property.selectedIndex];
    const stops = () => group().arms[arm.selectedIndex].stops;
    const current = () => (source === "steered" ? stops()[Number(slider.value)] : data.references[source]);
    const starred = (stop) => stop.calibrated === "reached" || stop.calibrated === "unreached";
    const unit = () => group().arms[arm.selectedIndex].unit;
    const strength = (stop) => (stop.alpha === null ? "none" : `${Number(stop.alpha.toFixed(2))}${unit()}${starred(stop) ? " ★" : ""}`);

    function fill(select, items) {
      select.replaceChildren(...items.map((item) => new Option(item.label)));
    }

    function show() {
      const stop = current();
      const wanted = url(stop.sound);
      if (audio.src !== wanted) {
        const at = audio.currentTime, playing = !audio.paused && !audio.ended;
        audio.src = wanted;
        audio.addEventListener("loadedmetadata", () => { audio.currentTime = Math.min(at, audio.duration || at); }, { once: true });
        if (playing) audio.play().catch(() => {});
      }
      find(".picture img").src = url(stop.picture);
      const turned = stops()[Number(slider.value)];
      find(".alpha").textContent = strength(turned) + (turned.calibrated === "unreached" ? " target not reached" : "");
      slider.setAttribute("aria-valuetext", strength(turned));
      root.querySelectorAll(".ab button").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.source === source)));
      find(".readout").replaceChildren(...READOUT.filter(([key]) => stop[key] !== null).map(([key, name, format]) => {
        const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
        dt.textContent = name;
        dd.textContent = format(stop[key]);
        box.append(dt, dd);
        return box;
      }));
      find(".heard").textContent = stop.transcript === null ? "" : `Recogniser: “${stop.transcript}”`;
    }

    function chooseArm() {
      const list = stops();
      slider.max = String(list.length - 1);
      slider.disabled = list.length < 2;
      slider.value = String(Math.max(0, list.findIndex(starred)));
      find(".ticks").replaceChildren(...(list.length < 2 ? [] : list).map((stop) => {
        const tick = document.createElement("span");
        tick.textContent = starred(stop) ? "★" : strength(stop);
        return tick;
      }));
      show();
    }

    function chooseProperty() {
      fill(arm, group().arms);
      chooseArm();
    }

    fill(property, data.groups);
    property.addEventListener("change", () => { source = "steered"; chooseProperty(); });
    arm.addEventListener("change", () => { source = "steered"; chooseArm(); });
    slider.addEventListener("input", () => { source = "steered"; show(); });
    root.querySelectorAll(".ab button").forEach((button) => {
      button.hidden = button.dataset.source !== "steered" && !data.references[button.dataset.source];
      button.addEventListener("click", () => { source = button.dataset.source; show(); });
    });
    play.addEventListener("click", () => {
      if (!audio.paused) return audio.pause();
      document.querySelectorAll("audio").forEach((other) => { if (other !== audio) other.pause(); });
      audio.play().catch(() => {});
    });
    const label = () => {
      play.textContent = audio.paused ? "▶" : "❚❚";
      play.setAttribute("aria-label", audio.paused ? "Play" : "Pause");
    };
    ["play", "pause", "ended"].forEach((event) => audio.addEventListener(event, label));
    find(".picture").addEventListener("click", (event) => {
      const box = find(".picture").getBoundingClientRect();
      if (audio.duration) audio.currentTime = ((event.clientX - box.left) / box.width) * audio.duration;
    });
    const clock = () => {
      const length = audio.duration || data.seconds;
      line.style.left = `${Math.min(100, (100 * audio.currentTime) / length)}%`;
      find(".time").textContent = `${audio.currentTime.toFixed(1)} / ${length.toFixed(1)} s`;
      if (!audio.paused) requestAnimationFrame(clock);
    };
    ["play", "seeked", "loadedmetadata", "ended"].forEach((event) => audio.addEventListener(event, clock));
    chooseProperty();
  }

  document.querySelectorAll(".player").forEach(start);
})();
