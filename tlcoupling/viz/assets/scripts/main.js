{
  const data = JSON.parse(document.getElementById("data").textContent);
  for (const [name, draw] of Object.entries(tlc.sections)) {
    const section = document.querySelector(`[data-section="${name}"]`);
    if (section) draw(section, data[name]);
  }
}
