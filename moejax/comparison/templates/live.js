// Reloads the page when the comparison has new results, at the place where the reader is.
const place = sessionStorage.getItem("place");
if (place) drawn.then(() => scrollTo(0, Number(place)));
let version;
setInterval(async () => {
  const answer = await fetch("version").catch(() => null);
  if (!answer?.ok) return;
  const now = await answer.text();
  if (version !== undefined && now !== version) {
    sessionStorage.setItem("place", scrollY);
    location.reload();
  }
  version = now;
}, 2000);
