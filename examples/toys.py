"""Two toy games with known answers: `--env-id examples.toys:Catch-v0`, or `DriftingCatch-v0`."""

import gymnasium as gym
import numpy as np

COLUMNS, ROWS, PIXELS = 5, 6, 64
BALL, PADDLE = np.array([255, 220, 40], np.uint8), np.array([40, 120, 255], np.uint8)


class Catch(gym.Env):
    """A ball falls one row a step; a paddle in the last row goes left, stays or goes right; +1 if
    it catches, else -1.

    A game lasts `ROWS` - 1 = 5 steps. Perfect play returns +1; random play catches one ball in
    five: -0.6. With `drift` p the ball jumps to the left or the right with probability p / 2 each,
    at each step; it stays where there is a wall.
    """

    metadata = {"render_modes": []}

    def __init__(self, drift: float = 0.0):
        self.drift = drift
        self.observation_space = gym.spaces.Box(0, 255, (PIXELS, PIXELS, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(3)
        self.ball = self.row = self.paddle = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.ball, self.row, self.paddle = int(self.np_random.integers(COLUMNS)), 0, COLUMNS // 2
        return draw(self.ball, self.row, self.paddle), {}

    def get_action_meanings(self) -> list[str]:
        """Atari's names: `python -m play` finds the arrow keys by them."""
        return ["LEFT", "NOOP", "RIGHT"]

    def step(self, action):
        self.paddle = min(max(self.paddle + int(action) - 1, 0), COLUMNS - 1)
        self.row += 1
        if self.drift:
            jump = self.np_random.choice(
                [-1, 0, 1], p=[self.drift / 2, 1 - self.drift, self.drift / 2]
            )
            self.ball = min(max(self.ball + int(jump), 0), COLUMNS - 1)
        over = self.row == ROWS - 1
        reward = (1.0 if self.ball == self.paddle else -1.0) if over else 0.0
        return draw(self.ball, self.row, self.paddle), reward, over, False, {}


def draw(ball: int, row: int, paddle: int) -> np.ndarray:
    """The picture: the paddle in the lower half of its cell, the ball in the upper half of its."""
    frame = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    xs, ys = (np.linspace(0, PIXELS, n + 1).round().astype(int) for n in (COLUMNS, ROWS))
    middle = (ys[1:] + ys[:-1]) // 2
    frame[middle[ROWS - 1] : ys[ROWS], xs[paddle] : xs[paddle + 1]] = PADDLE
    frame[ys[row] : middle[row], xs[ball] : xs[ball + 1]] = BALL
    return frame


def next_ball(ball: int, drift: float) -> np.ndarray:
    """The exact distribution of the ball's next column: (COLUMNS,) probabilities."""
    p = np.zeros(COLUMNS)
    for jump, share in ((-1, drift / 2), (0, 1 - drift), (1, drift / 2)):
        p[min(max(ball + jump, 0), COLUMNS - 1)] += share
    return p


gym.register("Catch-v0", Catch)
gym.register("DriftingCatch-v0", Catch, kwargs={"drift": 0.25})
