"""For people: play a game or its dream, look at what a run has learned.

    python -m play                         # the showcase: the real Pong beside its dream
    python -m play runs/Pong__...          # one's own run; prints the address of a page
    python -m play.pictures runs/Pong__... # film strips, films and learning curves into that folder

    from play import DreamEnv
    env = DreamEnv("runs/Pong__...")       # reset() and step() happen in the world model alone

runs.py: a trained run and its decoder. scenes.py: the game, its dream, DreamEnv. session.py:
what an open page plays. server.py: its server. page/: the page. showcase/: what is played where no
run is named; examples/showcase.py made it.
"""

from play.scenes import DreamEnv as DreamEnv
