"""What every page of this project is checked for in a real browser."""


def check_page(window) -> None:
    """No page is wider than a phone or a screen, no label of a chart is cut off or lies on another, and the console shows no error."""
    for width in (390, 1280):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert window.execute_script("return document.documentElement.scrollWidth") <= width
    for chart in window.execute_script("""return [...document.querySelectorAll("svg")].map(svg => {
        const frame = svg.getBoundingClientRect();
        return {frame: [frame.left, frame.top, frame.right, frame.bottom], labels: [...svg.querySelectorAll("text")].map(text => {
            const box = text.getBoundingClientRect();
            return [text.textContent, box.left, box.top, box.right, box.bottom];
        })};
    })"""):
        left, top, right, bottom = chart["frame"]
        for number, (text, x0, y0, x1, y1) in enumerate(chart["labels"]):
            assert left <= x0 and x1 <= right + 0.5 and top <= y0 and y1 <= bottom + 3, f"{text!r} is cut off"
            for other, a0, b0, a1, b1 in chart["labels"][:number]:
                assert min(x1, a1) <= max(x0, a0) or min(y1, b1) - max(y0, b0) <= 5, f"{text!r} lies on {other!r}"
    assert [entry for entry in window.get_log("browser") if entry["level"] == "SEVERE"] == []
