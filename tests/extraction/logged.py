"""The command, with a line for each batch that it encodes: `python -m tests.extraction.logged LOG DATASET OUT ...`."""

import os
import sys
from collections import Counter

from qwen_batched.extract import main
from qwen_batched.extraction.worker import Worker


def run(log, arguments):
    """Appends "part row frames" to `log` as a batch is about to be encoded; returns the command's exit code."""
    encode = Worker._encode

    def logged(worker, batch):
        line = f"{batch.writer.part.name} {batch.start} {len(batch.rows)}\n"
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line.encode())
        os.close(file)
        return encode(worker, batch)

    Worker._encode = logged
    try:
        return main(arguments)
    finally:
        Worker._encode = encode


def encoded(log):
    """What a log has: (part, row, frames) -> how often it was encoded."""
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter((part, int(row), int(frames)) for part, row, frames in map(str.split, lines))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
