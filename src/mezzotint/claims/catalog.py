"""Every claim, in the order of the page."""

from mezzotint.claims.autocast_rules import AUTOCAST_RULES
from mezzotint.claims.claim import Claim, Family
from mezzotint.claims.loss_scaling import LOSS_SCALING
from mezzotint.claims.memory import MEMORY
from mezzotint.claims.number_formats import NUMBER_FORMATS
from mezzotint.claims.quality import QUALITY
from mezzotint.claims.speed import SPEED

_ALL = (*AUTOCAST_RULES, *SPEED, *MEMORY, *QUALITY, *LOSS_SCALING, *NUMBER_FORMATS)

CLAIMS: tuple[Claim, ...] = tuple(claim for family in Family for claim in _ALL if claim.family is family)
