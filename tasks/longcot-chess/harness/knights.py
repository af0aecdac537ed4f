"""Knight problems: reading the prompt, and exact distances between squares.

Legend: n squares (start first, then the targets), D distances in knight moves.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Square = tuple[int, int]
Distances = NDArray[np.int64]

STEPS = ((1, 2), (2, 1), (2, -1), (1, -2), (-1, -2), (-2, -1), (-2, 1), (-1, 2))
_SQUARE = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_BOARD = re.compile(r"\b(\d+)\s*x\s*(\d+)\b")


@dataclass(frozen=True)
class Knight:
    """One problem: touch all `targets` from `start` on a board of `size` times `size`."""

    size: int
    start: Square
    targets: tuple[Square, ...]

    @property
    def squares(self) -> list[Square]:
        """Start first, then every target once; a target that is the start is touched already."""
        return list(dict.fromkeys((self.start, *self.targets)))


def read_knight(prompt: str) -> Knight | None:
    """The problem that a prompt states; None when it states another kind of problem."""
    board = _BOARD.search(prompt)
    squares = [(int(a), int(b)) for a, b in _SQUARE.findall(prompt)]
    if "knight" not in prompt.lower() or not board or not squares or board[1] != board[2]:
        return None
    return Knight(int(board[1]), squares[0], tuple(squares[1:]))


def distances(problem: Knight, *, method: str) -> Distances:
    """Knight moves between all squares of the problem, shape (n, n).

    Args:
        problem: Squares and size of the board.
        method: `bfs` walks the board, `formula` looks at the offsets only; they agree.

    Raises:
        ValueError: The method is unknown, or no knight reaches one of the squares.
    """
    squares = problem.squares
    if method == "formula" and problem.size >= SMALLEST_BOARD:
        return formula(np.array(squares), problem.size)
    if method not in ("bfs", "formula"):
        raise ValueError(f"harness.yaml: distance.method={method!r} is neither bfs nor formula")
    rows, columns = np.array(squares).T
    found = np.array([breadth_first(problem.size, square)[rows, columns] for square in squares])
    if (found < 0).any():
        raise ValueError(f"no knight reaches every square of a board of {problem.size}")
    return found


def breadth_first(size: int, source: Square) -> Distances:
    """Moves from `source` to every square of the board, shape (size, size); -1: out of reach."""
    moves = np.full((size + 4, size + 4), -1, np.int64)  # two rows and columns of margin
    board = moves[2:-2, 2:-2]
    front = np.zeros(moves.shape, bool)
    front[source[0] + 2, source[1] + 2] = True
    step = 0
    while front.any():
        moves[front] = step
        step += 1
        reached = np.zeros_like(front)
        for dx, dy in STEPS:
            reached[2:-2, 2:-2] |= front[2 + dx : size + 2 + dx, 2 + dy : size + 2 + dy]
        front[:] = False
        front[2:-2, 2:-2] = reached[2:-2, 2:-2] & (board < 0)
    return board.copy()


SMALLEST_BOARD = 5  # on smaller ones the border costs moves that `formula` does not know


def formula(squares: NDArray[np.int64], size: int) -> Distances:
    """Knight moves between squares by a closed formula, shape (n, n).

    On an unbounded board a knight needs at least `m = max(ceil(x / 2), ceil((x + y) / 3))` moves
    for an offset of `x >= y >= 0`, and one more when the colours do not fit, with two exceptions:
    (1, 0) takes 3 and (2, 2) takes 4. A border costs more moves in one case only, on boards of
    `SMALLEST_BOARD` and more: from a corner to its diagonal neighbour, 4 and not 2. The tests
    compare every pair of squares of small boards, and many of the large one, with `breadth_first`.
    """
    offset = np.abs(squares[:, None] - squares[None])
    x, y = offset.max(-1), offset.min(-1)
    least = np.maximum(-(-x // 2), -(-(x + y) // 3))
    moves = least + (least + x + y) % 2
    moves = np.where((x == 1) & (y == 0), 3, moves)
    moves = np.where((x == 2) & (y == 2), 4, moves)
    corner = np.all((squares == 0) | (squares == size - 1), axis=-1)
    touched = (x == 1) & (y == 1) & (corner[:, None] | corner[None])
    return np.where(touched, 4, moves)
