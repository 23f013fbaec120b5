"""What the operator has said about the SQL interface, as a session needs it."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.interface.settings import AUTO


@dataclass(frozen=True, slots=True)
class Interface:
    """`manager` is the role whose members may change the learning of any table; empty: none."""

    enabled: bool = True  # whether the proxy answers its functions and settings at all
    left_to_server: frozenset[str] = frozenset()  # functions that the proxy does not answer all the same
    manager: str = ""
    report_query_id: bool = False  # ParameterStatus after each adapted query
    adaptive_search: bool = True  # defaults that SHOW tells
    target_recall: float = 0.98
    optimize_for: str = "balanced"
    reads_settings: bool = False  # before the first query of a session: ALTER ROLE may have set them

    @property
    def defaults(self) -> dict[str, str]:
        """What SHOW says of settings that were never set."""
        return {
            "adaptive_search": "on" if self.adaptive_search else "off",
            "target_recall": f"{self.target_recall:g}",
            "optimize_for": self.optimize_for,
            "ef_search": AUTO,
            "probes": AUTO,
        }
