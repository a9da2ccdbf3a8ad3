"""What docs/hooks.py makes of docstrings and signatures. `make docs` builds the whole site, strictly."""

import importlib.util
import inspect

import pytest
import yaml

from commkit.inventory import SchemeCard
from commkit.registry import lookup, names
from tests.docs.blocks import ROOT

_spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


def card(name):
    return SchemeCard(name, "What it does", "", ("DDP",), "step", 2_000_000, 1_000_000, 4.0, 2)


@pytest.mark.parametrize("name", names("scheme"))
def test_every_knob_of_every_scheme_has_a_meaning(name):
    factory = lookup("scheme", name)
    _, described = hooks._docstring(factory)
    for knob in inspect.signature(factory).parameters:
        assert described.get(knob, "").strip(), f"{name}: nothing says what {knob} is"


@pytest.mark.parametrize("name", names("scheme"))
def test_every_page_says_in_what_a_scheme_differs_from_its_paper(name):
    told = hooks.differences(lookup("scheme", name))
    assert len(told.split()) > 3, f"{name}: say 'Differences from the paper: ...' in its docstring"
    page = hooks.scheme_page(card(name))
    assert page.count("Differences from the paper") == 1
    assert f"## Differences from the paper\n\n{told}\n" in page


def test_a_page_has_text_recipe_knobs_costs_and_parts():
    page = hooks.scheme_page(card("powersgd"))
    assert page.startswith("# powersgd\n\nPowerSGD (Vogels et al. 2019)")
    recipe = page.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe)["scheme"]["name"] == "powersgd"
    assert "| `rank` | `4` | 1-4 for convolutions" in page
    assert "| bytes per parameter sent by a rank | 1 |" in page
    assert "| bytes per parameter kept between steps | 4 |" in page
    assert "| collectives | 2 |" in page
    assert "[`PowerSGD`][commkit.aggregators.powersgd.PowerSGD]" in page


def test_knobs_are_found_where_the_docstring_says_they_are():
    told = {
        name: hooks._docstring(lookup("scheme", name))[1]
        for name in ("diloco", "m_sgc", "int8", "dilocox")
    }
    assert told["diloco"]["outer_lr"] == "0.7 in the paper."  # of its class
    assert told["m_sgc"]["transport"].startswith('"torch": point to point')  # as for backup
    assert told["int8"]["block_size"] == "elements per scale."  # its own
    assert told["dilocox"]["rank"].startswith("the factors'")  # on the way


def test_prose_has_no_marks_of_sphinx():
    assert (
        hooks._prose("see :class:`~commkit.Reducer` and ``x``") == "see `commkit.Reducer` and `x`"
    )
    html = "<p>see :class:<code>~commkit.Reducer</code></p>"
    assert hooks.on_page_content(html) == "<p>see <code>commkit.Reducer</code></p>"


def test_everything_that_commkit_exports_is_documented_once():
    homes = [path for p in hooks.PACKAGES for path in hooks._exports(p) if hooks._home(path) == p]
    assert len(homes) == len(set(homes)) == len(hooks._documented())
    assert "commkit.metrics.recorder.Recorder" in homes
    for package in hooks.PACKAGES:
        assert hooks.api_page(package).startswith(f"# {package}\n")
