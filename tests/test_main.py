"""The command refbn-d2: which commands it has, and how it starts them."""

import subprocess
import sys

import pytest
import tiny

from refbn_d2 import __main__ as cli
from refbn_d2 import commands


@pytest.fixture
def argv(monkeypatch):
    return lambda *arguments: monkeypatch.setattr(sys, "argv", ["refbn-d2", *arguments])


def test_a_new_module_is_a_command(argv, monkeypatch, tmp_path, capsys):
    (tmp_path / "say_hello.py").write_text(
        '"""Greets.\n\nMore."""\nimport sys\n\n\ndef main():\n    print("hello", *sys.argv)\n'
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    assert {"say-hello", "train", "classify", "compare", "convert"} <= set(cli.command_names())
    argv("say-hello", "you")
    cli.main()
    assert capsys.readouterr().out == "hello refbn-d2 say-hello you\n"
    argv("--help")
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    (line,) = [x for x in lines if x.split()[:1] == ["say-hello"]]
    assert line.split(maxsplit=1)[1] == "Greets."


def test_help_imports_no_command(monkeypatch):
    script = (
        "import sys; sys.argv = ['refbn-d2']; from refbn_d2.__main__ import main; main(); "
        "assert not [m for m in sys.modules if m.startswith('refbn_d2.commands.')]"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=tiny.environment(), check=True
    )


def test_an_unknown_command_is_one_line(argv, capsys):
    argv("trian")
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 1
    assert capsys.readouterr().err.startswith("error: refbn-d2 has no command 'trian'; it has cl")


@pytest.mark.parametrize("tool", sorted(p.name for p in (tiny.ROOT / "tools").glob("*.py")))
def test_each_tool_is_a_command(tool, monkeypatch):
    started = []
    monkeypatch.setattr(cli, "run_command", started.append)
    path = tiny.ROOT / "tools" / tool
    exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
    assert len(started) == 1 and started[0] in cli.command_names()
