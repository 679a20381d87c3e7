"""Figures of jobs in templates."""

from django import template

from jobs import showing

register = template.Library()
register.filter("gibibytes", showing.gibibytes)
