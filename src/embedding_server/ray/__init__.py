# SPDX-License-Identifier: MIT OR Apache-2.0
"""More than one machine, with Ray: ``serve run embedding_server.ray:app``.

Ray is imported only when it is used: ``--help`` needs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["app"]


def app(arguments: Mapping[str, Any]) -> Any:
    """The Ray Serve application of ``arguments``, as ``model=all-MiniLM-L6-v2 max_replicas=4``.

    They are the fields of ``options.ServeOptions`` and the settings of ``serve``, which replace
    their environment variables and keys of the file of EMBEDDING_SERVER_CONFIG. Raises
    ConfigurationError and ModelUnavailable for arguments that can't work.
    """
    from embedding_server.ray.serving import application

    return application(arguments)
