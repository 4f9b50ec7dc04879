"""The fixed parts of the report's page: policy, style, controls and script."""

POLICY = (
    "default-src 'none'; media-src data:; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
"""The page may show what it carries and may ask nobody for anything."""

CONTROLS = """
<div class="controls" role="toolbar" aria-label="Playback" hidden>
<button type="button" id="play">Pause</button>
<span role="group" aria-label="Speed"><button type="button" data-speed="0.5" aria-pressed="false">Half speed</button
><button type="button" data-speed="1" aria-pressed="true">Full speed</button></span>
</div>
"""

STYLE = """
:root { --ground: #f4f3ef; --sheet: #fff; --ink: #1c1b19; --soft: #66635b; --line: #dcd9d0; --is: #b3401c;
  --was: #8b877c; --good: #1d6b43; --bad: #a3261c; --c0: #b3401c; --c1: #22618f; }
@media (prefers-color-scheme: dark) { :root { --ground: #131312; --sheet: #1d1d1b; --ink: #f0eee8; --soft: #a5a197;
  --line: #34332f; --is: #ff9a6b; --was: #8d897f; --good: #74d39c; --bad: #ff8f82; --c0: #ff9a6b; --c1: #7fbdf0; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans", sans-serif; overflow-wrap: anywhere;
  -webkit-text-size-adjust: 100%; }
main { max-width: 80rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 3rem) 7rem; }
.title { color: var(--is); font-weight: 600; font-size: .9rem; }
h1 { font-weight: 650; font-size: clamp(1.6rem, 3.6vw, 2.6rem); line-height: 1.14; letter-spacing: -.02em; 
  max-width: 26em; margin-top: .4rem; text-wrap: balance; }
.tally { margin-top: .9rem; color: var(--soft); font-size: 1.1rem; }
.tally b { color: var(--ink); }
section { margin-top: clamp(2.2rem, 5vw, 3.8rem); }
h2 { font-size: 1.3rem; font-weight: 650; letter-spacing: -.01em; }
.note { color: var(--soft); margin: .1rem 0 1rem; max-width: 44em; }
.grid { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); }
.tiny .grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.card { background: var(--sheet); border: 1px solid var(--line); border-radius: 12px; overflow: hidden; min-width: 0;
  position: relative; padding-bottom: .9rem; }
.card.large { grid-column: 1 / -1; }
.shots { display: grid; gap: 2px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.shots.n3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.strip { gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(min(45%, 15rem), 1fr)); }
.tiny .strip { grid-template-columns: repeat(auto-fill, minmax(min(28%, 8.5rem), 1fr)); }
.strip video { border-radius: 8px; }
figure { min-width: 0; }
video { display: block; width: 100%; height: auto; background: var(--line); }
video.pixels { image-rendering: pixelated; }
figcaption { font-size: .82rem; padding: .4rem .9rem 0; color: var(--soft); }
.is figcaption { color: var(--is); font-weight: 650; }
h3 { font-size: 1rem; font-weight: 500; line-height: 1.4; padding: .5rem .9rem 0; }
h3 bdi { display: block; }
h3 small { display: block; color: var(--soft); font-weight: 400; font-size: .82rem; }
.meter { display: flex; align-items: center; gap: .8rem; padding: .55rem .9rem 0; font-size: .82rem;
  color: var(--soft); }
.meter b { font-weight: 400; }
.meter em { font-style: normal; font-variant-numeric: tabular-nums; white-space: nowrap; }
.meter i { position: relative; flex: 1; height: 2px; background: var(--line); margin: 0 6px; }
.meter s, .meter u { position: absolute; top: 50%; transform: translateY(-50%); }
.meter s { height: 4px; background: var(--is); border-radius: 2px; }
.meter u { width: 12px; height: 12px; margin-left: -6px; border-radius: 50%; }
.meter .was { background: var(--sheet); border: 2px solid var(--was); }
.meter .is { background: var(--is); }
.farther s, .farther .is { background: var(--bad); }
.path { padding: .3rem .9rem 0; font-size: .82rem; color: var(--soft); font-variant-numeric: tabular-nums; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .75rem .6rem; border-top: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-size: .82rem; font-weight: 500; border: 0; padding-block: .2rem; }
th:first-child { text-align: left; padding-left: 0; font-weight: 600; }
th small { display: block; font-weight: 400; color: var(--soft); max-width: 46ch; font-size: .86rem; }
.word { font-weight: 650; }
.good { color: var(--good); } .bad { color: var(--bad); } .even { color: var(--soft); }
.charts { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.chart { --tone: var(--c0); background: var(--sheet); border: 1px solid var(--line); border-radius: 12px;
  padding: .6rem; }
.chart.c1 { --tone: var(--c1); }
.chart figcaption { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; padding: .2rem .4rem .5rem; }
.chart strong { color: var(--ink); margin-right: auto; }
.key::before { content: ""; display: inline-block; width: 1.3rem; height: 3px; margin-right: .45rem;
  vertical-align: middle; background: var(--tone); border-radius: 2px; }
.key.raw::before { opacity: .35; height: 1.5px; }
.key.held::before { background: none; border-top: 2px dashed var(--ink); border-radius: 0; }
svg { display: block; width: 100%; height: auto; }
.axis line { stroke: var(--line); }
.axis text { fill: var(--soft); font-size: 12px; }
polyline { fill: none; stroke: var(--tone); stroke-linejoin: round; }
polyline.raw { opacity: .3; } polyline.mean { stroke-width: 2.5; }
polyline.held { stroke: var(--ink); stroke-dasharray: 4 4; } .chart circle { fill: var(--ink); }
details { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr); gap: .35rem 1.5rem;
  margin-top: .8rem; }
dt { color: var(--soft); }
.controls { position: fixed; z-index: 1; left: 50%; bottom: 1rem; transform: translateX(-50%); display: flex;
  gap: .5rem; padding: .35rem; border-radius: 999px; background: var(--sheet); border: 1px solid var(--line);
  box-shadow: 0 4px 24px rgb(0 0 0 / .18); white-space: nowrap; }
.controls[hidden] { display: none; }
button { font: inherit; font-size: .88rem; color: inherit; background: none; border: 0; border-radius: 999px;
  padding: .45rem .8rem; min-height: 2.5rem; cursor: pointer; }
button:hover { background: var(--line); }
button[aria-pressed=true] { background: var(--ink); color: var(--ground); }
#play { min-width: 4.6rem; font-weight: 650; }
.zoom { position: absolute; top: .5rem; right: .5rem; opacity: 0; background: var(--sheet); min-height: 0;
  padding: .2rem .7rem; font-size: .82rem; transition: opacity .15s; }
.card:hover .zoom, .zoom:focus-visible { opacity: 1; }
:focus-visible { outline: 3px solid var(--is); outline-offset: 2px; }
@media (max-width: 40rem) {
  thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  tr { display: grid; grid-template-columns: repeat(4, auto); border-top: 1px solid var(--line); padding: .7rem 0; }
  th, td { border: 0; padding: 0; text-align: left; }
  tbody th { grid-column: 1 / -1; padding-bottom: .4rem; }
  td::before { content: attr(data-of); display: block; font-size: .75rem; color: var(--soft); font-weight: 400; }
  td:last-child { align-self: end; }
  .zoom { display: none; }
  .axis text { font-size: 17px; }
}
@media print { .controls, .zoom { display: none; } .card, .chart, tr { break-inside: avoid; } }
"""

SCRIPT = """
"use strict";
const toolbar = document.querySelector(".controls");
const groups = [...document.querySelectorAll(".shots")].map(box => [...box.querySelectorAll("video")]);
const visible = new Set();
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
let chosen = false, speed = 1;

function run(group) {
  for (const video of group) {
    video.playbackRate = speed;
    if (playing && visible.has(group)) video.play().catch(() => {}); else video.pause();
  }
}
function setSpeed(value) {
  speed = value;
  for (const button of toolbar.querySelectorAll("[data-speed]"))
    button.setAttribute("aria-pressed", String(Number(button.dataset.speed) === speed));
  groups.forEach(run);
}
function setPlaying(value) {
  playing = value;
  document.getElementById("play").textContent = playing ? "Pause" : "Play";
  groups.forEach(run);
}

if (toolbar) {
  toolbar.hidden = false;
  const watcher = new IntersectionObserver(entries => {
    for (const entry of entries) {
      const group = groups.find(one => one[0].closest(".shots") === entry.target);
      if (entry.isIntersecting) visible.add(group); else visible.delete(group);
      run(group);
    }
  }, { rootMargin: "200px" });
  for (const group of groups) {
    for (const video of group) {
      const ready = () => {
        // Clips of a few dozen pixels are enlarged as they are; clips under 1.5 s flicker at full speed.
        if (video.videoWidth <= 160) { video.classList.add("pixels"); document.body.classList.add("tiny"); }
        if (video.duration < 1.5 && !chosen && speed === 1) setSpeed(0.5);
      };
      video.addEventListener("loadedmetadata", ready);
      video.addEventListener("ended", () => {
        // The clips of a card start together: the loop waits for the last one.
        if (group.every(other => other.ended)) setTimeout(() => run(group), 150);
      });
      video.removeAttribute("controls");
      video.loop = false;
      if (video.dataset.same) video.src = document.getElementById(video.dataset.same).src;
      if (video.readyState >= 1) ready();
    }
    watcher.observe(group[0].closest(".shots"));
  }
  setInterval(() => {
    // A clip that lags runs a little faster; a seek would stall it, and on a busy machine stall it again and again.
    for (const group of visible) for (const video of group.slice(1)) {
      if (video.ended || group[0].ended || video.seeking) continue;
      const behind = group[0].currentTime - video.currentTime;
      if (Math.abs(behind) > 0.5) video.currentTime = group[0].currentTime;
      else video.playbackRate = speed * (1 + (Math.abs(behind) > 0.03 ? Math.sign(behind) * 0.15 : 0));
    }
  }, 250);
  for (const card of document.querySelectorAll(".card")) {
    const button = document.createElement("button");
    button.type = "button"; button.className = "zoom"; button.textContent = "Larger";
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () =>
      button.setAttribute("aria-pressed", String(card.classList.toggle("large"))));
    card.querySelector(".shots").after(button);
  }
  toolbar.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.id === "play") setPlaying(!playing);
    else { chosen = true; setSpeed(Number(button.dataset.speed)); }
  });
  setPlaying(playing);
}
"""
