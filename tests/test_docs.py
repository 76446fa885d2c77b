"""The pages: every link and anchor leads somewhere, on a code host and in the site; what is written from the code is current."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from megatron_llm.cli.main import build_parser, main
from tests.test_readme import ROOT, blocks, copy_tree

MADE_OF = ("README.md", "CONTRIBUTING.md", "mkdocs.yml", "docs", "examples", "benchmarks/results", "megatron_llm/config")


def pages() -> list[Path]:
    """Every page that somebody reads."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]


@cache
def read(page: Path) -> tuple[list[str], set[str]]:
    """The links of a page, and its anchors by the rule of code hosts. The parser is not the one that makes the site."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    links: list[str] = []
    anchors: list[str] = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type != "inline":
            continue
        for child in token.children or []:
            links += [str(child.attrs[name]) for name in ("href", "src") if name in child.attrs]
            links += re.findall(r'(?:href|src)="([^"]*)"', child.content) if child.type == "html_inline" else []
        if before is not None and before.type == "heading_open":
            words = "".join(child.content for child in token.children or [] if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
            anchors.append(slug if slug not in anchors else f"{slug}-{anchors.count(slug)}")
    for token in tokens:
        links += re.findall(r'(?:href|src|srcset)="([^"]*)"', token.content) if token.type == "html_block" else []
    return links, set(anchors)


def broken(page: Path) -> list[str]:
    """What is wrong with the links of a page, a sentence each."""
    problems = []
    for link in read(page)[0]:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            if parts.scheme not in ("https", "mailto") or (parts.scheme == "https" and "." not in parts.netloc):
                problems.append(f"{link} is no address")
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not target.exists():
            problems.append(f"{link} leads to nothing")
        elif parts.fragment and (target.suffix != ".md" or parts.fragment not in read(target)[1]):
            problems.append(f"{link}: no such heading")
    return problems


def build(root: Path, into: Path) -> subprocess.CompletedProcess[str]:
    """Make the site of a repository, with every warning an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(into)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_wrong_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A `b`: c\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "page.md"
    right = "[a](there.md) [b](there.md#a-b-c) [c](there.md#twice-1) [d](https://example.org/x) `[e](no.md)`\n"
    wrong = "[f](gone.md) [g](there.md#gone) [h](#gone) [i](http://example.org)\n\n| a |\n|---|\n| [j](gone.md#a) |\n"
    page.write_text(right + wrong)
    assert [problem.split()[0].rstrip(":") for problem in broken(page)] == [
        "gone.md", "there.md#gone", "#gone", "http://example.org", "gone.md#a",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the site is made with mkdocs-material: pip install 'megatron_llm[docs]'")
    path = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_the_site_is_made_without_a_warning_and_read_without_a_network(site: Path) -> None:
    made = sorted(page for page in site.rglob("*.html") if page.name != "404.html")  # which a server shows
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} < {page.stem for page in made}
    for page in made:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|object)[^>]*(?:src|data)="([^"]*)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preload|icon|preconnect)"[^>]*href="([^"]*)"', text)
        assert loaded and [place for place in loaded if urlsplit(place).netloc] == [], page
        for place in loaded:
            assert (page.parent / unquote(urlsplit(place).path)).exists(), f"{page}: {place}"
    index = (site / "search/search_index.js").read_text(encoding="utf-8")
    assert '"data.html#chat-templates-and-masks"' in index and '"repository/' not in index
    shown = (site / "repository/examples/torchrun_single_node.sh.html").read_text(encoding="utf-8")
    assert "torchrun_common.sh" in shown


@pytest.mark.slow
def test_the_search_works_from_files(site: Path, tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000"]
    address = f"file://{site}/formats.html?q=Tijdeman"  # a word of docs/data.md alone
    done = subprocess.run([browser, *options, "--dump-dom", address], capture_output=True, text=True, timeout=600)
    found = re.findall(r'<a href="([^"]*)" class="md-search-result__link', done.stdout)
    assert found and all("/data.html" in link for link in found), done.stderr[-2000:]


@pytest.mark.slow
def test_a_site_with_wrong_links_is_not_made(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the site is made with mkdocs-material: pip install 'megatron_llm[docs]'")
    for name in MADE_OF:
        source, copy = ROOT / name, tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_tree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    wrong = {
        "docs/data.md": ("gone.md", "../examples/gone.sh", "formats.md#lost", "#missing"),
        "README.md": ("docs/data.md#vanished", "docs/absent.md"),
    }
    for page, links in wrong.items():
        with (tmp_path / page).open("a", encoding="utf-8") as text:
            text.writelines(f"\n[a]({link})\n" for link in links)
    (tmp_path / "docs/unlisted.md").write_text("# A page that the table of contents lacks\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    for word in ("gone.md", "examples/gone.sh", "lost", "missing", "vanished", "absent.md", "unlisted.md"):
        assert word in said, said


def test_the_lists_of_settings_and_commands_are_current() -> None:
    from docs.list_settings import PAGES

    for name, page in PAGES.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page(), "run python docs/list_settings.py"


def test_the_list_of_settings_has_every_key() -> None:
    """The JSON schema, which pydantic makes, is another way to the same keys."""
    from megatron_llm.config import Config

    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    schema = Config.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    keys = [(key, field) for section in sections for key, field in section["properties"].items()]
    assert len(keys) > 150
    for key, field in keys:
        (row, *_) = [line for line in text.splitlines() if line.startswith(f"| `{key}` |")]
        for word in re.findall(r"[a-z]{4,}", field.get("description", "").lower()):
            assert word in text.lower(), (key, row)


def test_the_figure_has_the_levels_that_are_checked() -> None:
    import tomllib

    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    levels = [package.strip() for level in contract["layers"] for package in level.split("|")]
    figure = (ROOT / "docs/architecture.svg").read_text(encoding="utf-8").partition("<!-- levels -->")[2].partition("</g>")[0]
    assert re.findall(r'class="text name[^>]*>([^<]+)<', figure) == levels


def is_run(page: str) -> bool:
    """Whether a test takes the commands of a page."""
    others = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    tests = [path.read_text(encoding="utf-8") for path in others]
    return any(f'"{page}"' in text and re.search(r"\bblocks\(|run_commands\(", text) for text in tests)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_one_of_the_command_line(page: Path) -> None:
    """Blocks without a language are run besides; those marked sh need what is not here, such as a hub or large models."""
    name = page.relative_to(ROOT).as_posix()
    shown = {language: "".join(blocks(language, name)).replace("\\\n", " ").splitlines() for language in ("", "sh")}
    ours = {language: [line for line in lines if re.search(r"megatron[-_]llm ", line)] for language, lines in shown.items()}
    assert not ours[""] or is_run(name), f"no test runs the commands of {name}"
    for line in ours[""] + ours["sh"]:
        words = shlex.split(line, comments=True)
        start = words.index("megatron_llm" if "megatron_llm" in words else "megatron-llm")
        build_parser().parse_args(words[start + 1 :])


@pytest.mark.slow
def test_the_commands_about_adapters_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.hf.folders import make_folder

    make_folder(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/fine_tuning.md").read_text(encoding="utf-8").partition("\n## LoRA\n")[2].partition("\n## ")[0]
    Path("page.md").write_text(page)
    (shown,) = blocks("yaml", str(tmp_path / "page.md"))
    training = {"sequence_length": 16, "global_batch_size": 1, "steps": 1}
    rest = {"data": {"kind": "synthetic"}, "training": training, "logging": {"run_dir": "runs/lora"}, "device": "cpu"}
    Path("config.yaml").write_text(yaml.safe_dump(yaml.safe_load(shown) | rest))
    assert main(["train", "config.yaml"]) == 0
    commands = [line for block in blocks("", str(tmp_path / "page.md")) for line in block.splitlines()]
    assert len(commands) == 2
    for command in commands:
        assert main(shlex.split(command, comments=True)[1:]) == 0
    assert Path("hf/merged/config.json").is_file() and Path("hf/adapter/adapter_config.json").is_file()
