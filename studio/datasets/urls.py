from django.urls import path

from studio.datasets import views

app_name = "datasets"
_VERSION = "<int:dataset_id>/v/<int:number>/"
urlpatterns = [
    path("", views.dataset_list, name="list"),
    path("upload/", views.upload, name="upload"),
    path("<int:dataset_id>/", views.detail, name="detail"),
    path("<int:dataset_id>/licence/", views.change_licence, name="licence"),
    path("<int:dataset_id>/delete/", views.delete, name="delete"),
    path(_VERSION, views.version_page, name="version"),
    path(_VERSION + "inspection/", views.inspection, name="inspection"),
    path(_VERSION + "statistics/", views.statistics, name="statistics"),
    path(_VERSION + "problems/", views.problems, name="problems"),
    path(_VERSION + "problems.csv", views.problems_csv, name="problems_csv"),
    path(_VERSION + "repair/", views.repair, name="repair"),
    path(_VERSION + "corrections/", views.corrections, name="corrections"),
    path(_VERSION + "versions/", views.versions, name="versions"),
    path(_VERSION + "used-by/", views.used_by, name="used_by"),
    path(_VERSION + "mapping/", views.mapping, name="mapping"),
    path(_VERSION + "rows/<int:line>/", views.row, name="row"),
    path(_VERSION + "file/", views.file, name="file"),
]
