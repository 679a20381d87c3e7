from django.urls import path

from studio.catalogue import adapter_pages, views

app_name = "catalogue"
urlpatterns = [
    path("models/", views.adapters, name="adapters"),
    path("models/<int:adapter_id>/", adapter_pages.adapter, name="adapter"),
    path("models/<int:adapter_id>/samples/", adapter_pages.samples, name="samples"),
    path("models/<int:adapter_id>/blind/", adapter_pages.blind_choice, name="blind"),
    path("models/<int:adapter_id>/card/", adapter_pages.edit, name="edit_card"),
    path("models/<int:adapter_id>/download/", views.download, name="download"),
    path("methods/", views.which_method, name="methods"),
    path("base-models/", views.base_models, name="base_models"),
    path("base-models/register/", views.register_base_model_page, name="register_base_model"),
    path("base-models/<int:base_model_id>/", views.base_model, name="base_model"),
]
