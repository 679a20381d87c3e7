"""Webhooks and e-mail: telling others what happened in a team."""
