"""Numbers that name, to the kernels of any language, what a loss is made of; csrc/ has the same enums."""

from enum import IntEnum


class Surrogate(IntEnum):
    """Of a policy loss; its own parameters."""

    CLIPPED = 0  # 1 - eps_low, 1 + eps_high, delta
    CISPO = 1  # eps_high, log eps_high
    SAPO = 2  # t_pos, t_neg
    REINFORCE = 3


class RatioOf(IntEnum):
    """What a policy loss's ratio is the exponential of."""

    TOKEN = 0
    MEAN = 1
    MEAN_STOPPED = 2  # GSPO-token: the sequence's ratio with the token's gradient
    SUM = 3


class Penalty(IntEnum):
    """The estimate of a KL."""

    NONE = 0
    K1 = 1
    K2 = 2
    K3 = 3


class Sampler(IntEnum):
    """The correction for the sampler's log-probs."""

    NONE = 0
    TRUNCATE = 1
    MASK = 2


class Score(IntEnum):
    """Of a sequence, from its sum or mean x."""

    PLAIN = 0  # x
    POWER = 1  # (e^(power x) - 1) / power
    JS = 2  # log 2 + log s(x)


class Pair(IntEnum):
    """The loss on two scores; its own parameters."""

    LOGISTIC = 0  # right, wrong, gamma, lam; with a margin c_min, c_max - c_min, lam, tau, steepness
    SQUARE = 1  # aim
    HINGE = 2
    EXO = 3  # log(1 - eps), log eps
    NCA = 4
    BCO = 5
    SPPO = 6  # aim
    APO_ZERO = 7
    APO_DOWN = 8
    DISCO = 9  # tau
