"""What no statement may do, whoever sends it: change the state of a final job, or lower a fencing token."""

from django.db import migrations

MAKE = """
CREATE FUNCTION jobs_keep_final() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state IN ('succeeded', 'failed', 'cancelled') AND NEW.state IS DISTINCT FROM OLD.state THEN
        RAISE EXCEPTION 'job % is %, which is final: it cannot become %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'check_violation', CONSTRAINT = 'a_final_state_stays';
    END IF;
    IF NEW.attempt < OLD.attempt THEN
        RAISE EXCEPTION 'attempt of job % cannot fall from % to %', OLD.id, OLD.attempt, NEW.attempt
            USING ERRCODE = 'check_violation', CONSTRAINT = 'an_attempt_never_falls';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER jobs_keep_final BEFORE UPDATE OF state, attempt ON jobs_job
    FOR EACH ROW EXECUTE FUNCTION jobs_keep_final();
"""

REMOVE = """
DROP TRIGGER jobs_keep_final ON jobs_job;
DROP FUNCTION jobs_keep_final();
"""


class Migration(migrations.Migration):
    dependencies = [("jobs", "0002_queue")]

    operations = [migrations.RunSQL(MAKE, REMOVE)]
