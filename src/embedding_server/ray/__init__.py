# SPDX-License-Identifier: MIT OR Apache-2.0
"""Beyond one machine, with Ray: ``serve run embedding_server.ray:app``.

Ray itself is imported where it is used only: ``--help`` needs none of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__all__ = ["app"]

# A server of ours tells nobody that it runs. Ray reads this when it starts a cluster; one that
# runs already was told by whoever started it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def app(arguments: Mapping[str, Any]) -> Any:
    """The Ray Serve application of ``arguments``, as ``model=all-MiniLM-L6-v2 max_replicas=4``.

    They are the fields of ``options.ServeOptions`` and every setting of the server that means
    something here, over its environment variable and the file of EMBEDDING_SERVER_CONFIG. Raises
    ConfigurationError and ModelUnavailable for what can't be meant.
    """
    from embedding_server.ray.serving import application

    return application(arguments)
