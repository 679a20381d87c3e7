from django.urls import path

from studio.catalogue import views

app_name = "catalogue"
urlpatterns = [
    path("models/", views.adapters, name="adapters"),
    path("models/<int:adapter_id>/", views.adapter, name="adapter"),
    path("models/<int:adapter_id>/download/", views.download, name="download"),
    path("models/<int:adapter_id>/check/", views.check_files_now, name="check_files"),
    path("methods/", views.which_method, name="methods"),
    path("base-models/", views.base_models, name="base_models"),
    path("base-models/register/", views.register_base_model_page, name="register_base_model"),
    path("base-models/<int:base_model_id>/", views.base_model, name="base_model"),
]
