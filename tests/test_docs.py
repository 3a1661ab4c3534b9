"""The book keeps step with the code: a page for every attack and defence, every option named, every link alive."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from maodun.attacks.registry import ATTACKS
from maodun.defenses.registry import DEFENSES

ROOT = Path(__file__).parents[1]
PAGES = {"autoattack-plus": "autoattack", "autoattack-rand": "autoattack"}


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_has_a_page_that_names_its_options_and_norms(name):
    text = (ROOT / "docs" / "attacks" / f"{PAGES.get(name, name)}.md").read_text()
    attack = ATTACKS[name]
    missing = [entry.name for entry in dataclasses.fields(attack) if entry.init and f"`{entry.name}`" not in text]
    assert missing == []
    assert f"`{name}`" in text or f"--attack {name}" in text or f'"{name}"' in text
    assert all(norm in text for norm in attack.norms)


@pytest.mark.parametrize("name", sorted(DEFENSES))
def test_every_defence_has_a_page(name):
    text = (ROOT / "docs" / "defenses" / f"{name}.md").read_text()
    assert len(text) > 150


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_links_and_files_named_in_the_book_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for recipe in re.findall(r"recipes/[\w/-]+\.yaml", text):
        assert (ROOT / recipe).exists(), recipe
