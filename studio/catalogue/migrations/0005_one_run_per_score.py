import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("accounts", "0001_initial"),
        ("catalogue", "0004_number_versions"),
        ("datasets", "0001_initial"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.RemoveConstraint(
            model_name="score",
            name="one_score_per_evaluation",
        ),
        migrations.AlterField(
            model_name="score",
            name="run",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.CASCADE, related_name="scores", to="catalogue.evaluationrun"
            ),
        ),
        migrations.AlterField(
            model_name="score",
            name="test_set",
            field=models.CharField(
                choices=[("held_out", "Held-out rows"), ("general", "General set"), ("suite", "Suite")],
                help_text="Of its run, so that lists need not look.",
                max_length=10,
            ),
        ),
        migrations.AddConstraint(
            model_name="adapter",
            constraint=models.UniqueConstraint(fields=("team", "name", "version"), name="one_adapter_per_version"),
        ),
        migrations.AddConstraint(
            model_name="score",
            constraint=models.UniqueConstraint(fields=("run", "evaluation"), name="one_score_per_evaluation"),
        ),
    ]
