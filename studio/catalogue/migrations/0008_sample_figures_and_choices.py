import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
        ("catalogue", "0007_search_and_views"),
    ]

    operations = [
        migrations.AddField(
            model_name="sample",
            name="figure",
            field=models.CharField(
                blank=True,
                default="",
                help_text="Evaluation that the row's figures are of; empty: not measured yet.",
                max_length=80,
            ),
            preserve_default=False,
        ),
        migrations.AddField(
            model_name="sample",
            name="base_figure",
            field=models.FloatField(help_text="Of the base's answer; null where the row has no figure.", null=True),
        ),
        migrations.AddField(
            model_name="sample",
            name="adapter_figure",
            field=models.FloatField(help_text="Of the adapter's answer.", null=True),
        ),
        migrations.CreateModel(
            name="SampleChoice",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                (
                    "preferred",
                    models.CharField(
                        choices=[("adapter", "The adapter"), ("base", "The base"), ("neither", "Neither")],
                        max_length=10,
                    ),
                ),
                ("at", models.DateTimeField(auto_now_add=True)),
                (
                    "sample",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, related_name="choices", to="catalogue.sample"
                    ),
                ),
                (
                    "user",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, related_name="+", to=settings.AUTH_USER_MODEL
                    ),
                ),
            ],
            options={
                "constraints": [
                    models.UniqueConstraint(fields=("sample", "user"), name="one_choice_per_person_and_sample")
                ],
            },
        ),
    ]
