"""A chess engine for tests: speaks UCI and knows one opening, from the first position."""

import sys

ROWS = (
    "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR",
    "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR",
    "rnbqkbnr/pppp1ppp/8/4p3/4P3/8/PPPP1PPP/RNBQKBNR",
    "rnbqkbnr/pppp1ppp/8/4p3/4P3/5N2/PPPP1PPP/RNBQKB1R",
)

if __name__ == "__main__":
    n_moves = 0
    for line in sys.stdin:
        match line.split():
            case ["uci"]:
                print("uciok")
            case ["isready"]:
                print("readyok")
            case ["position", *words]:
                n_moves = len(words) - words.index("moves") - 1 if "moves" in words else 0
            case ["go", "nodes", _]:
                print("info depth 1 pv e2e4 e7e5 g1f3 b8c6\nbestmove e2e4 ponder e7e5")
            case ["go", "perft", "1"]:
                print("e2e4: 1\n\nNodes searched: 1")
            case ["d"]:
                print(f"Fen: {ROWS[n_moves]} w KQkq - 0 1\nCheckers:")
        sys.stdout.flush()
