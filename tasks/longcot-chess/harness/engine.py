"""Lines of best moves from a UCI engine that is installed on the machine; a process of its own.

The engine is not part of this program: Stockfish is under the GPL, is never required, and without
one there is no answer. It lists the legal moves itself (`go perft 1`) and says who gives check
(`d`), which is all that the notation needs.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

N_MOVES = 3
PLACES = ("/usr/games", "/usr/local/bin")  # Debian puts games outside many a PATH
_FEN = re.compile(r"FEN:\s*(\S+ [wb] \S+ \S+ \d+ \d+)")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The `engine` section of harness.yaml."""

    use: bool
    command: str
    nodes: int
    line: str  # pv: the main line of one search; each: a search for every move


@dataclass(frozen=True)
class Position:
    """What the engine says about a position."""

    board: dict[str, str]  # square -> piece letter, upper case for white
    legal: tuple[str, ...]  # moves such as e2e4, e7e8q
    check: bool  # of the side to move


def read_fen(prompt: str) -> str | None:
    """The position that a prompt states; None when it states none."""
    found = _FEN.search(prompt)
    return found[1] if found else None


def best_line(fen: str, settings: Engine) -> str | None:
    """Three moves in algebraic notation with spaces between; None without an engine or a line."""
    places = [
        shutil.which(settings.command),
        *(shutil.which(settings.command, path=p) for p in PLACES),
    ]
    command = next((place for place in places if place), None)
    if command is None:
        return None
    try:
        with _started(command) as process:
            return _line(Talk(process), fen, settings)
    except (OSError, EOFError):  # it cannot be started here, or it ended
        return None


class Talk:
    """Questions to a running engine."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        """Sets what makes its answers repeatable."""
        self._process = process
        self._ask("uci", until="uciok")
        for name, value in (("Threads", 1), ("Hash", 64)):
            self._say(f"setoption name {name} value {value}")
        self._ask("isready", until="readyok")

    def position(self, fen: str, moves: list[str]) -> Position:
        """The position after `moves`."""
        self._set(fen, moves)
        legal = [
            line.split(":")[0]
            for line in self._ask("go perft 1", until="Nodes searched")
            if re.match(r"[a-h][1-8][a-h][1-8][qrbn]?:", line)
        ]
        shown = self._ask("d", until="Checkers:")
        now = next(line.split(maxsplit=1)[1] for line in shown if line.startswith("Fen:"))
        check = len(shown[-1].split()) > 1
        return Position(read_board(now), tuple(sorted(legal)), check)

    def search(self, fen: str, moves: list[str], *, nodes: int) -> list[str]:
        """The main line from the position after `moves`."""
        self._set(fen, moves)
        said = self._ask(f"go nodes {nodes}", until="bestmove")
        lines = [line.split(" pv ")[1].split() for line in said if " pv " in line]
        best = said[-1].split()[1]
        # The last report can belong to an iteration that was overruled.
        return next((line for line in reversed(lines) if line[0] == best), [best])

    def _set(self, fen: str, moves: list[str]) -> None:
        self._say(f"position fen {fen}" + (f" moves {' '.join(moves)}" if moves else ""))

    def _say(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def _ask(self, text: str, *, until: str) -> list[str]:
        self._say(text)
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line.strip())
            if said[-1].startswith(until):
                return said
        raise EOFError(f"the engine ended after {text!r}")


def read_board(fen: str) -> dict[str, str]:
    """Square (such as e4) -> piece letter."""
    board = {}
    for rank, row in zip("87654321", fen.split()[0].split("/"), strict=True):
        file = 0
        for sign in row:
            if sign.isdigit():
                file += int(sign)
            else:
                board["abcdefgh"[file] + rank] = sign
                file += 1
    return board


def notation(move: str, before: Position, after: Position) -> str:
    """Standard Algebraic Notation of a move such as g1f3."""
    source, target, promoted = move[:2], move[2:4], move[4:]
    piece = before.board[source].upper()
    takes = target in before.board or (piece == "P" and source[0] != target[0])
    if piece == "K" and abs(ord(source[0]) - ord(target[0])) == 2:
        text = "O-O" if target[0] == "g" else "O-O-O"
    elif piece == "P":
        text = (source[0] + "x" if takes else "") + target
        text += f"={promoted.upper()}" if promoted else ""
    else:
        rivals = [
            other[:2]
            for other in before.legal
            if other[2:4] == target
            and other[:2] != source
            and before.board[other[:2]] == before.board[source]
        ]
        which = ""
        if rivals:
            if all(other[0] != source[0] for other in rivals):
                which = source[0]
            elif all(other[1] != source[1] for other in rivals):
                which = source[1]
            else:
                which = source
        text = piece + which + ("x" if takes else "") + target
    if after.check:
        text += "+" if after.legal else "#"
    return text


def _line(talk: Talk, fen: str, settings: Engine) -> str | None:
    moves: list[str] = []
    while len(moves) < N_MOVES:
        found = talk.search(fen, moves, nodes=settings.nodes)
        if found[0] == "(none)":
            return None  # the game ends before the third move
        moves += found if settings.line == "pv" else found[:1]
    moves = moves[:N_MOVES]
    positions = [talk.position(fen, moves[:k]) for k in range(N_MOVES + 1)]
    return " ".join(
        notation(move, before, after)
        for move, before, after in zip(moves, positions, positions[1:], strict=False)
    )


@contextmanager
def _started(command: str) -> "Iterator[subprocess.Popen[str]]":
    pipe = subprocess.PIPE
    process = subprocess.Popen([command], stdin=pipe, stdout=pipe, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
