"""The paper's command line: ``python run.py --arch pibert-base --task RTE --restore CKPT …``.

The same as ``token-pruning train``, or with ``--eval`` as ``token-pruning eval``.
"""

import sys

if __name__ == "__main__":
    try:
        from token_pruning.lab.cli import paper_main
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(paper_main(sys.argv[1:]))
