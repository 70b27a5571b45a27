"use strict";
// Filters the answers by benchmark, language, model and words; without this script all of them are shown.
const filter = document.querySelector(".filter");
if (filter) {
  const samples = [...document.querySelectorAll(".sample")];
  const fits = (wanted, found) => wanted === "" || wanted === found;
  const apply = () => {
    const { benchmark, language, model, words } = Object.fromEntries(new FormData(filter));
    const sought = words.trim().toLowerCase();
    let shown = 0;
    for (const sample of samples) {
      const question = sample.querySelector("summary").textContent.toLowerCase();
      let left = 0;
      for (const answer of sample.querySelectorAll(".answer")) {
        const text = question + answer.querySelector(".quoted").textContent.toLowerCase();
        answer.hidden = !(fits(model, answer.dataset.model) && text.includes(sought));
        left += !answer.hidden;
      }
      sample.hidden = !(left && fits(benchmark, sample.dataset.benchmark) && fits(language, sample.dataset.language));
      shown += !sample.hidden;
    }
    filter.querySelector("output").textContent = `${shown} of ${samples.length} questions`;
  };
  filter.hidden = false;
  filter.addEventListener("input", apply);
  filter.addEventListener("submit", event => event.preventDefault());
  apply();
}
