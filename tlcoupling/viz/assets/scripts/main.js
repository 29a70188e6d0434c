{
  const data = JSON.parse(document.getElementById("data").textContent);
  for (const [name, draw] of Object.entries(tlc.sections)) {
    const section = document.querySelector(`[data-section="${name}"]`);
    if (section) draw(section, data[name]);
  }
  for (const [name, value] of Object.entries(tlc.start ?? {})) tlc.choice.set(name, value);
}
