"""`--slow` runs the tests that take minutes, too; every test runs on one thread."""

import shutil
from pathlib import Path

import pytest
import torch

from tests import parity


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--parity", type=Path, metavar="FILE", help="write the comparison with recorded values of the published code to FILE")


@pytest.fixture(scope="module")
def window():
    """A browser without a screen; the test is skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (requirements-dev.txt)")
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def pytest_configure(config):
    torch.set_num_threads(1)
    if config.getoption("--parity") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--parity: the processes of -n do not know of one another's values; drop -n")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; --slow runs it"))


def pytest_sessionfinish(session):
    if session.config.getoption("--parity"):
        parity.write(session.config.getoption("--parity"))
