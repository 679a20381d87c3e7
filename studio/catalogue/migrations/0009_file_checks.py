import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("catalogue", "0008_sample_figures_and_choices")]

    operations = [
        migrations.CreateModel(
            name="FileCheck",
            fields=[
                (
                    "adapter",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.CASCADE,
                        primary_key=True,
                        related_name="file_check",
                        serialize=False,
                        to="catalogue.adapter",
                    ),
                ),
                ("checked_at", models.DateTimeField(db_index=True)),
                ("damage", models.TextField(blank=True, help_text="What was found, for people; empty: all is whole.")),
            ],
        ),
    ]
