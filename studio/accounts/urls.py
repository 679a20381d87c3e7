"""Signing in, one's own account, and what a team's admin looks after."""

from django.urls import path

from studio.accounts import signing_in, team_pages, views

app_name = "accounts"
urlpatterns = [
    path("login/", signing_in.sign_in, name="login"),
    path("login/link/<str:secret>/", signing_in.login_link, name="login_link"),
    path("logout/", signing_in.sign_out, name="logout"),
    path("account/", views.account, name="account"),
    path("account/name/", views.change_name, name="change_name"),
    path("account/password/", views.change_password, name="change_password"),
    path("account/sessions/end/", views.end_sessions, name="end_sessions"),
    path("no-team/", views.no_team, name="no_team"),
    path("team/switch/", views.switch_team, name="switch_team"),
    path("team/members/", team_pages.members, name="members"),
    path("team/members/<int:membership_id>/role/", team_pages.member_role, name="member_role"),
    path("team/members/<int:membership_id>/remove/", team_pages.member_remove, name="member_remove"),
    path("team/members/<int:membership_id>/link/", team_pages.member_link, name="member_link"),
    path("team/tokens/", team_pages.tokens, name="tokens"),
    path("team/tokens/<int:token_id>/revoke/", team_pages.token_revoke, name="token_revoke"),
    path("team/audit/", team_pages.audit, name="audit"),
]
