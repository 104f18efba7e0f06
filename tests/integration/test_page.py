"""The server's page, in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from _serving import serving


def look(folder: Path, url: str, *options: str) -> str:
    """What the browser says, after two seconds of the page's own time."""
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", "--window-size=1000,800",
            "--virtual-time-budget=2000", *options, url,
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_shows_what_the_server_does(pack: Path, tmp_path: Path) -> None:
    from PIL import Image

    with serving(pack, "--device", "cpu", "--resident", "2") as server:
        asked = {"model": "math", "prompt": [5, 6, 7], "max_tokens": 9, "ignore_eos": True}
        assert server.post("/v1/completions", asked).status == 200
        url = f"{server.url}/"
        page = look(tmp_path, url, "--dump-dom")
        assert re.search(r'id="state"[^>]*class="ready"[^>]*>ready<', page)
        rows = dict(re.findall(r"<tr><td><span class=\"dot[^>]*></span>(\w+)</td>(.*?)</tr>", page))
        assert set(rows) == {"base", "python", "math", "shell"}
        cells = re.findall(r"<td>(.*?)</td>", rows["math"])
        assert cells[0] == "on the device" and cells[-1] == "9", "tokens that it said"
        assert re.search(r"\d ms|\d s", cells[-2]), "the time to its first token"
        assert re.search(r"<li><i[^>]*></i>experts [\d.]+ MB</li>", page)
        for scheme, setting in (("light", 1), ("dark", 0)):
            picture = tmp_path / f"{scheme}.png"
            look(
                tmp_path,
                url,
                f"--screenshot={picture}",
                f"--blink-settings=preferredColorScheme={setting}",
            )
            with Image.open(picture) as image:
                grey = image.convert("L")
                paper, ink = grey.getpixel((2, 2)), grey.getextrema()
            assert (paper > 200) == (scheme == "light")
            assert ink[1] - ink[0] > 150
        server.process.terminate()
        assert server.process.wait(60) == 0
    assert "Traceback" not in server.log
