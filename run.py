"""The paper's command line: ``python run.py --arch pibert-base --task RTE --restore CKPT …``.

The same as ``token-pruning train``, or with ``--eval`` as ``token-pruning eval``.
"""

import sys

from token_pruning.lab.cli import paper_main

if __name__ == "__main__":
    sys.exit(paper_main(sys.argv[1:]))
