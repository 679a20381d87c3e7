from django.urls import path

from studio.reviews import blind_pages, policy_pages, scan_pages, thread_pages, views

app_name = "reviews"

urlpatterns = [
    path("", views.inbox, name="inbox"),
    path("count/", views.count, name="count"),
    path("policy/", policy_pages.policy, name="policy"),
    path("scan-limits/<int:dataset_id>/v/<int:number>/", scan_pages.limits, name="scan_limits"),
    path("scan-limits/<int:dataset_id>/v/<int:number>/<slug:name>/", scan_pages.waive, name="waive_scan"),
    path("submit/<int:adapter_id>/", views.submit, name="submit"),
    path("of-adapter/<int:adapter_id>/", views.adapter_review, name="adapter_review"),
    path("<int:review_id>/", views.review, name="review"),
    path("<int:review_id>/gates/", views.gates, name="gates"),
    path("<int:review_id>/approve/", views.approve, name="approve"),
    path("<int:review_id>/reject/", views.reject, name="reject"),
    path("<int:review_id>/ask-changes/", views.ask_changes, name="ask_changes"),
    path("<int:review_id>/withdraw/", views.withdraw, name="withdraw"),
    path("<int:review_id>/waive/", views.waive, name="waive"),
    path("<int:review_id>/recheck/", views.recheck, name="recheck"),
    path("<int:review_id>/roll-back/", views.roll_back, name="roll_back"),
    path("<int:review_id>/people/", views.people, name="people"),
    path("<int:review_id>/samples/", blind_pages.samples, name="samples"),
    path("<int:review_id>/samples/next/", blind_pages.next_sample, name="next_sample"),
    path("<int:review_id>/samples/undo/", blind_pages.undo, name="undo"),
    path("<int:review_id>/samples/verdicts.jsonl", blind_pages.export, name="export"),
    path("<int:review_id>/samples/<int:item_id>/judge/", blind_pages.judge, name="judge"),
    path("<int:review_id>/samples/<int:item_id>/annotate/", blind_pages.annotate, name="annotate"),
    path("<int:review_id>/threads/", thread_pages.threads, name="threads"),
    path("<int:review_id>/threads/<int:comment_id>/edit/", thread_pages.edit, name="edit_comment"),
    path("<int:review_id>/threads/<int:comment_id>/resolve/", thread_pages.resolve, name="resolve"),
]
