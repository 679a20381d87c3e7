"""People, teams, roles, API tokens and audit events."""
