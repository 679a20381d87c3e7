"""The home page."""

from django.urls import path

from jobs import home

urlpatterns = [path("", home.home, name="home")]
