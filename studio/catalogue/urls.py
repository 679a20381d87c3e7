from django.urls import path

from studio.catalogue import adapter_pages, compare_pages, list_pages, naming_pages, run_pages, suite_pages, views

app_name = "catalogue"
urlpatterns = [
    path("models/", list_pages.adapters, name="adapters"),
    path("models/compare/", compare_pages.compare, name="compare"),
    path("models/export.<str:kind>", list_pages.export, name="export"),
    path("models/views/", list_pages.save_view, name="save_view"),
    path("models/views/<int:view_id>/delete/", list_pages.delete_view, name="delete_view"),
    path("models/<int:adapter_id>/", adapter_pages.adapter, name="adapter"),
    path("models/<int:adapter_id>/samples/", adapter_pages.samples, name="samples"),
    path("models/<int:adapter_id>/blind/", adapter_pages.blind_choice, name="blind"),
    path("models/<int:adapter_id>/card/", adapter_pages.edit, name="edit_card"),
    path("models/<int:adapter_id>/names/", naming_pages.naming, name="naming"),
    path("models/<int:adapter_id>/download/", views.download, name="download"),
    path("models/<int:adapter_id>/check/", views.check_files_now, name="check_files"),
    path("methods/", views.which_method, name="methods"),
    path("suites/", suite_pages.suites, name="suites"),
    path("suites/new/", suite_pages.new_suite, name="new_suite"),
    path("suites/new/tasks/", suite_pages.new_task_suite, name="new_task_suite"),
    path("suites/<int:suite_id>/", suite_pages.suite, name="suite"),
    path("suites/<int:suite_id>/change/", suite_pages.change_suite, name="change_suite"),
    path("evaluation-runs/<int:run_id>/", run_pages.run, name="run"),
    path("base-models/", views.base_models, name="base_models"),
    path("base-models/register/", views.register_base_model_page, name="register_base_model"),
    path("base-models/<int:base_model_id>/", views.base_model, name="base_model"),
    path("base-models/<int:base_model_id>/check/", views.check_base, name="check_base"),
]
