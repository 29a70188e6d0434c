"""Fail unless a screenshot exists and shows a page: text on it, and colours."""

import sys
from pathlib import Path

from PIL import Image

path = Path(sys.argv[1])
if not path.is_file():
    sys.exit(f"{path}: there is no screenshot")
image = Image.open(path).convert("RGB")
colours = image.getcolors(maxcolors=image.width * image.height)
most = max(count for count, _ in colours) / (image.width * image.height)
print(f"{path.name}: {image.width} x {image.height}, {len(colours)} colours, commonest {most:.1%}")
if len(colours) < 100 or most > 0.995:
    sys.exit(f"{path}: the page is blank, or nearly")
