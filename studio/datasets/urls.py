from django.urls import path

from studio.datasets import adding_views, learning_pages, row_pages, scan_views, upload_views, views

app_name = "datasets"
_VERSION = "<int:dataset_id>/v/<int:number>/"
urlpatterns = [
    path("", views.dataset_list, name="list"),
    path("upload/", views.upload, name="upload"),
    path("upload/paste/", adding_views.paste, name="paste"),
    path("upload/hub/", adding_views.hub, name="hub"),
    path("upload/folder/", adding_views.folder, name="folder"),
    path("uploads/", upload_views.uploads, name="uploads"),
    path("uploads/<uuid:upload_id>/", upload_views.upload_item, name="upload_item"),
    path("uploads/<uuid:upload_id>/progress/", upload_views.upload_progress, name="upload_progress"),
    path("uploads/<uuid:upload_id>/target/", upload_views.upload_target, name="upload_target"),
    path("uploads/<uuid:upload_id>/cancel/", upload_views.upload_cancel, name="upload_cancel"),
    path("<int:dataset_id>/", views.detail, name="detail"),
    path("<int:dataset_id>/licence/", views.change_licence, name="licence"),
    path("<int:dataset_id>/delete/", views.delete, name="delete"),
    path(_VERSION, row_pages.version_page, name="version"),
    path(_VERSION + "inspection/", views.inspection, name="inspection"),
    path(_VERSION + "learned/", learning_pages.learned, name="learned"),
    path(_VERSION + "statistics/", views.statistics, name="statistics"),
    path(_VERSION + "problems/", views.problems, name="problems"),
    path(_VERSION + "problems.csv", views.problems_csv, name="problems_csv"),
    path(_VERSION + "scans/", scan_views.scans, name="scans"),
    path(_VERSION + "scans/<slug:name>/", scan_views.scan, name="scan"),
    path(_VERSION + "scans/<slug:name>.csv", scan_views.scan_csv, name="scan_csv"),
    path(_VERSION + "scans/<slug:name>/run/", scan_views.run_scan_again, name="scan_again"),
    path(_VERSION + "repair/", views.repair, name="repair"),
    path(_VERSION + "corrections/", views.corrections, name="corrections"),
    path(_VERSION + "versions/", views.versions, name="versions"),
    path(_VERSION + "changes/", views.changes, name="changes"),
    path(_VERSION + "used-by/", views.used_by, name="used_by"),
    path(_VERSION + "mapping/", views.mapping, name="mapping"),
    path(_VERSION + "rows/", row_pages.row_table, name="row_table"),
    path(_VERSION + "rows/prepare/", row_pages.prepare_again, name="prepare_rows"),
    path(_VERSION + "rows/<int:line>/", row_pages.row, name="row"),
    path(_VERSION + "file/", views.file, name="file"),
    path(_VERSION + "export/", views.export, name="export"),
]
