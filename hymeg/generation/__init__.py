"""Text from the model in the layout in which it trains. `replies.generate` is the way in; tools and the evaluation
inside training stand above it.
"""

from hymeg import platform

platform.install()

from hymeg.generation.drafting import Drafting  # noqa: E402
from hymeg.generation.replies import Answer, generate, generate_dealt  # noqa: E402
from hymeg.generation.sampling import Sampling  # noqa: E402

__all__ = ["Answer", "Drafting", "Sampling", "generate", "generate_dealt"]
