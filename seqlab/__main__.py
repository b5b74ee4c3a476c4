"""python -m seqlab"""

from seqlab.cli import main

if __name__ == "__main__":
    main()
